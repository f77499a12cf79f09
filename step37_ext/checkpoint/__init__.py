"""Reading checkpoints' headers; the small model: sizes, dialogues, training, writing."""
