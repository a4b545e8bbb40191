"""Finding the misconfigured node before the job does.

``facts``, ``gpus`` and ``storage`` gather what a rank knows about itself; ``network`` and
``storage`` try what ranks can only do together; ``judge`` turns all of it into one line a check.
"""
