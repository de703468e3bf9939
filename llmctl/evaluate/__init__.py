"""How well a model predicts a text, and how far its distributions are from another model's."""
