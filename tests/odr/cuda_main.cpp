// Links the two compilations of cuda_unit.cu: nothing of theirs may be defined twice.
int main() {}
