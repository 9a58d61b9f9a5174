"""The sections of a card: each class holds the values of the templates that show it."""
