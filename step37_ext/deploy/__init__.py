"""Which GPUs serve the released model: the memory plan and the serve command."""
