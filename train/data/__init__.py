"""From instructions to tokens: read, check, render, tokenise, cache. The way in is `loading.load_tokenised`."""
