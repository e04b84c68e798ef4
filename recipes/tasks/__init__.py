"""The tasks that recipes train for, one module each."""
