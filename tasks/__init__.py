"""SeqIO registrations, one file per corpus, tables first. Importing a module registers; no data are read."""
