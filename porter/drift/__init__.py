"""How far one model's outputs are from another's."""
