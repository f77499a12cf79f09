"""What every benchmark shares: cells and floors, timing, results that survive a stop, tables."""
