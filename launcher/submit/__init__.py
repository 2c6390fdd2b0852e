"""Third stage: does exactly a plan, with its code and configuration frozen. The way in is `submission.submit`."""
