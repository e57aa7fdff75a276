"""What if data summaries travel instead of weights?"""
