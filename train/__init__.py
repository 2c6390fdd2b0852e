"""The GPU node: everything that runs inside a job. Never imports `launcher`.

`job` is the entry point of a job; `prepare` fetches models and tokenizes data before it, and `export` merges and chats after it. All
share the vocabulary of `config` (every key of a run), `section` (how keys are checked), `schedules`, `sizing`, `errors` and `log`.
The rest are rooms: folders of modules whose own docstring says what is where. CONTRIBUTING.md lists them in the order in which they
may import each other.
"""
