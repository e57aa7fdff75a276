"""`farflung bench`: this system measured with real processes, beside what the machine can do."""
