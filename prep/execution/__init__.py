"""How stages are run: processes or Ray, records of finished work, intermediate files, resume, progress."""
