"""Arrays in, arrays out: the operations of the model, each with its forms."""
