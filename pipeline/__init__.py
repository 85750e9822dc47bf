"""dwindle.pipeline."""
