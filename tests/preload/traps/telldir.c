/* Positions in listings: told, gone back to, and true while other names come and go. */
#include "trap.h"
#include <dirent.h>

enum { COUNT = 700 };
static char names[COUNT + 10][20];
static long places[COUNT + 10];

int main(void) {
    begin();
    if (mkdir("many", 0755)) return 1;
    char name[40];
    for (int i = 0; i < COUNT; i++) {
        snprintf(name, sizeof name, "many/name%d", i);
        close(made(name, O_WRONLY));
    }
    for (int turn = 0; turn < 4; turn++) {
        DIR *directory = opendir("many");
        struct dirent *entry;
        int count = 0, wrong = 0;
        for (;; count++) {
            places[count] = telldir(directory);
            if (!(entry = readdir(directory))) break;
            strcpy(names[count], entry->d_name);
        }
        printf("entries %d\n", count);
        if (turn == 2) {
            close(made("many/another", O_WRONLY));
            unlink("many/name5");
        }
        for (int i = 1; i < count; i += 7) {
            seekdir(directory, places[i]);
            entry = readdir(directory);
            int gone = !strcmp(names[i], "name5");
            if (!gone && (!entry || (strcmp(entry->d_name, names[i]) && strcmp(entry->d_name, "another")))) wrong++;
        }
        rewinddir(directory);
        int again = 0;
        while (readdir(directory)) again++;
        printf("wrong %d, again %d\n", wrong, again);
        rewinddir(directory);
        for (int i = 0; i < 10; i++) readdir(directory);
        fflush(stdout);
        pid_t child = fork();
        if (child == 0) {
            int rest = 0;
            while (readdir(directory)) rest++;
            _exit(rest > 100 ? 0 : 1);
        }
        wait_for(child);
        closedir(directory);
    }
    return 0;
}
