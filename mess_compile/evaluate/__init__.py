"""Records and stores exit statistics, and diagnoses heads and gates from them."""
