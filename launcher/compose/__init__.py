"""First stage: Hydra overrides become a list of checked runs.

The way in is `composer.compose`. `overrides` parses the words, `checks` refuses single mistakes, and `tree` talks to Hydra. `axes`
spans grid and zip, and `naming` names runs and sweeps. `keys` knows every key as data, and `key_reference` prints them. `suggestions`
answers a wrong key or value, `foreign_words` the options of other tools.

What another tool calls a key is a word in `suggestions.FOREIGN`. A new key itself belongs in `train.config` or `launcher.config`.
"""
