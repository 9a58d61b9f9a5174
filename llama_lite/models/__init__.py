"""Model configurations, references and loading. May import: what hub may, and hub."""
