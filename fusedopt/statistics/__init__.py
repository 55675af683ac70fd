"""Statistics of training: what a step did to each parameter (`values`), and over time (`recorder`)."""
