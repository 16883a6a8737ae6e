"""What does multi-token prediction cost in each step, and what does it gain for clients?"""
