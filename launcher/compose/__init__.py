"""First stage: Hydra overrides become a list of checked runs. The way in is `composer.compose`."""
