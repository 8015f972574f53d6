"""Can a map between base and fine-tune switch what the fine-tune learnt off and on?"""
