"""The model: to read (transformer) and to run on a mesh (decoder)."""
