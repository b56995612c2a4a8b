"""What trains the tiny models of other families, with the models as they were trained; for those who have a checkout."""
