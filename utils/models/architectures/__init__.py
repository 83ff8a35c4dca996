"""What is peculiar to one architecture, a module for each `model_type`; toy models of them."""
