# Nothing is compiled here: elfprobe compiles its programs when it starts. `make help` says what there is.
DESTDIR =
PREFIX = /usr/local
PYTHON = /usr/bin/python3
share = $(PREFIX)/share
zsh = $(share)/zsh/site-functions
to = $(DESTDIR)$(share)

.PHONY: help install uninstall deb
help:
	@echo 'make install     elfprobe and elfplot, man pages, completion for bash and zsh, documents, below PREFIX'
	@echo 'make uninstall   takes away what make install installed, and the compiled programs that elfprobe keeps'
	@echo 'make deb         elfprobe_VERSION_all.deb, for Debian and Ubuntu; needs no root'
	@echo 'make help        this text'
	@echo
	@echo 'PREFIX=$(PREFIX)  DESTDIR=$(DESTDIR) (prepended to all paths)'

# Only this umask: root's may be one that lets nobody else read.
install:
	install -d "$(to)/elfprobe/elf" "$(to)/doc/elfprobe/docs" "$(DESTDIR)$(PREFIX)/bin"
	install elfprobe.py elfplot.py "$(to)/elfprobe"
	install -m 644 elfprobe.c elfhooks.c "$(to)/elfprobe"
	install -m 644 elf/*.py elf/page.css elf/page.js "$(to)/elfprobe/elf"
	install -m 644 README.md CLOUDLAB.md "$(to)/doc/elfprobe"
	install -m 644 docs/* "$(to)/doc/elfprobe/docs"
	ln -sf ../share/elfprobe/elfprobe.py "$(DESTDIR)$(PREFIX)/bin/elfprobe"
	ln -sf ../share/elfprobe/elfplot.py "$(DESTDIR)$(PREFIX)/bin/elfplot"
	umask 022 && $(PYTHON) -B packaging/pages.py \
	    "$(to)/man" "$(to)/bash-completion/completions" "$(DESTDIR)$(zsh)" "$(share)"

uninstall:
	rm -rf "$(to)/elfprobe" "$(to)/doc/elfprobe" "$(DESTDIR)/var/cache/elfprobe"
	for name in elfprobe elfplot; do rm -f "$(DESTDIR)$(PREFIX)/bin/$$name" "$(to)"/man/man[18]/$$name.[18] \
	    "$(to)/bash-completion/completions/$$name" "$(DESTDIR)$(zsh)/_$$name"; done

deb:
	packaging/deb
