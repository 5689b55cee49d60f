"""The compiled steps of one model, over token ids only."""
