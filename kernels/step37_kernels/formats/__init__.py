"""Number formats: quantise, dequantise and shard, one file per format."""
