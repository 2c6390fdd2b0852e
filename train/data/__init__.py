"""From a file or the hub to micro-batches. In reading order, which is the order of the data:

    source        what `data.source` means, its fingerprint in run ids, and the name of its tokens in the cache
    row_files     rows from .json, .jsonl, .csv and .parquet files, each checked with its line
    rows          the two forms of a row, instruction or conversation, and the check that gives plain values one of them
    reading       the rows of a run, from files or the hub, split into those to train on and those held out
    rendering     a row as text, through the chat template or Alpaca's prompt, and where its answers are in the text
    tokenizing    text as an example: tokens and labels, truncated, with a count of what was lost
    token_table   examples as flat arrays, and their folder in the cache
    loading       all of the above for one run, once per sweep
    sampling      which examples an optimizer step sees, and how they are split into micro-batches
    buckets       sequences of similar length, for decoders that compute pads too
    micro_batch   a micro-batch on the device, with the indices that attention, adapters and loss need

A row is what a file holds; once tokenized it is an example; an example in a run's batch is a `TokenSequence`.
The first four are light, so that the launcher rejects bad data on the login node.

Where a new data format belongs:

- a new kind of file: a reader in `row_files.READERS`; everything else follows from its suffix there
- a new form of row, such as preference pairs: a class in `rows` with its check, and its text in `rendering`
- other columns for the same content: `rows.parse_row`
- another way to choose or order examples: `sampling`
"""
