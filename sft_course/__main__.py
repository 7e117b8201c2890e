"`python -m sft_course` is `sft-course`."
from sft_course.tools.cli import main

if __name__ == "__main__":
    main()
