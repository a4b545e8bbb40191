"""How a group shares a sequence: one loop each, written in device verbs."""
