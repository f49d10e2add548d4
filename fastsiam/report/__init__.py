"""What `python -m fastsiam.report` is made of: runs read from their folders, figures drawn, a page written."""
