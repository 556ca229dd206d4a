"""The way from a base model to an assistant, on a model so small that it goes all the way on a CPU in minutes."""
