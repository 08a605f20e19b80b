"""Other tools' models: their operators written in standard ones, and what a model holds of them."""
