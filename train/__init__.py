"""The GPU node: everything that runs inside a job. Never imports `launcher`."""
