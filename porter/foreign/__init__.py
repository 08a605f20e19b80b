"""Other tools' models: what their operators mean, written in standard ones, and what a model holds of them."""
