"""What `kvsim` exits with."""

DONE, BUG, BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 0, 1, 2, 130, 141
MISSED = 1
"""Of `kvsim validate`: some bar is missed. A bug ends with 1 too, and a traceback."""
NO_OPTION = 3
"""Of `kvsim plan`."""
EXIT_CODES = """\b
Exit codes:
  0    done
  1    a bug in kvsim: it ends with a traceback, please report it
  2    bad input: one line on standard error says field, value, rule and fix;
       nothing has been written
  130  interrupted (Ctrl-C); nothing has been written
  141  the reader of the output closed the pipe, as `| head` does
"""
SWEEP_EXIT_CODES = """\b
Exit codes:
  0    done; cases that are invalid or do not fit are rows with that status
  1    a bug in kvsim, or a worker process that died: rows with the status
       bug or crashed; all other cases are done
  2    bad input or a cluster that does not answer: one line on standard
       error; what was saved before stays
  130  interrupted (Ctrl-C): what is finished is saved, run it again to go on
"""
PLAN_EXIT_CODES = EXIT_CODES + """\
  3    no candidate meets the SLO: one line on standard error says so; the files
       of --out have been written, and every option has its reason
"""
