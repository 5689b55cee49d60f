"""Many requests, one model: a server in Python, and over HTTP in OpenAI's protocol."""
