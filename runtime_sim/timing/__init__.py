"""Command programs in time: the event engine and the predictor on top of it."""
