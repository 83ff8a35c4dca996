"""Reading what a person has: documents for the domain adapter, labelled examples for the task adapter."""
