"""Base models as ordinary folders, whatever they came from. The way in is `staging.stage_model`."""
