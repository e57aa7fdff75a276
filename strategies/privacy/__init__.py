"""What can be told of one sample?"""
