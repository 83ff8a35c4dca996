"""One labelled row at a time: its columns by role, its conversation, its choices, its marks."""
