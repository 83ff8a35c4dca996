"""What fits where and how long it takes, before any weight is read; refusals; what --dry-run says."""
