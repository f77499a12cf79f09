"""Which GPUs serve the released model: memory plan, performance model, the serve command."""
