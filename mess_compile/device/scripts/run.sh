# run.sh COMMAND...: run COMMAND. The shell stays, so that a program that was killed gives 128 + its signal.
"$@"; exit $?
