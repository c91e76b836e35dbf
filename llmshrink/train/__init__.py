"""Training: what a student is taught by, what is made small, and the steps of gradient, by transformers' Trainer."""
