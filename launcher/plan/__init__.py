"""Second stage: a verdict per run and the packs that train what is left; changes nothing. The way in is `planner.make_plan`."""
