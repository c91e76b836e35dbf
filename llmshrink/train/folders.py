"""What a training keeps in the folder of work of its run."""

STUDENT = "student"  # what a student is before it has learned
ROUNDED = "rounded"  # the same once it was rounded, where it is trained through that
CACHE = "cache"  # what its teacher says
TEXT, NEW_TEXT = "text", "text.new"  # rows to learn from, and these before it is known that nobody else works here
STATES, TRAINED = "trainer", "trained"  # saved on the way, and what was learned
LOTTERY = "lottery"  # rounds
ALL = (STUDENT, f"{STUDENT}.partial", ROUNDED, f"{ROUNDED}.partial", CACHE, STATES, TRAINED, TEXT, LOTTERY)
