"""What a model consists of: its class, its linear modules, and what a loading library may have got wrong in it."""
