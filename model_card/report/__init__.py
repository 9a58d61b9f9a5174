"""`report.html` of runs, evaluations and studies: one page that needs no network, from their records alone."""
