use std::fs;

use clap::Parser;
use tempfile::NamedTempFile;

use super::*;

const WEB: &str = "\
# A VM.
name = 'web'
kernel = '/boot/vmlinuz'
memory = \"256M,max=1G\"
cpus = 0x2
disk = ['/a.img', '/b.qcow2,readonly']
append = ''
no_agent = true
prefault = false
";

fn file(text: &str) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    fs::write(file.path(), text).unwrap();
    file
}

/// What `ballast run` is told by a file and more words; or the sentence that refuses.
fn told(text: &str, more: &[&str]) -> Result<Vec<String>, String> {
    let file = file(text);
    let path = file.path().to_str().unwrap();
    let words = ["ballast", "-v", "run", "--config", path].iter().chain(more).map(OsString::from).collect();
    let words = expanded(words).map_err(|failure| format!("{failure:?}").replace(path, "FILE"))?;
    // Whatever was put together is understood.
    RunAlone::try_parse_from(&words).map_err(|error| error.to_string())?;
    let words = words.into_iter().map(|word| word.into_string().unwrap().replace(path, "FILE"));
    Ok(words.collect())
}

#[test]
fn a_files_keys_become_options_in_their_order() {
    let words = told(WEB, &[]).unwrap();
    let wanted = "ballast -v run --name=web --kernel=/boot/vmlinuz --memory=256M,max=1G --cpus=2 --disk=/a.img \
                  --disk=/b.qcow2,readonly --append= --no-agent --config FILE";
    assert_eq!(words.join(" "), wanted);
}

#[test]
fn the_command_line_goes_before_the_file() {
    let words = told(WEB, &["--name", "db", "--disk=/c.img", "--cpus=1"]).unwrap().join(" ");
    for gone in ["--name=web", "/a.img", "/b.qcow2", "--cpus=2"] {
        assert!(!words.contains(gone), "{gone}: {words}");
    }
    assert!(words.ends_with("--name db --disk=/c.img --cpus=1"), "{words}");
    let huge = format!("{WEB}thp = true\nmemory_backing = 'memfd'\n");
    let words = told(&huge, &["--hugepages", "2M"]).unwrap().join(" ");
    assert!(!words.contains("--thp") && !words.contains("--memory-backing"), "{words}");
    // And the other way round.
    let huge = format!("{WEB}hugepages = '2M'\n");
    assert!(!told(&huge, &["--thp"]).unwrap().join(" ").contains("--hugepages"));
}

#[test]
fn everything_that_is_wrong_is_named_with_its_line() {
    let wrong = "memroy = '1G'\nkernel-cache = 'off'\ncpus = 1000\nthp = 'yes'\n\ndisk = [['a']]\nzzz = 1\n\
                 grow = 'up'\nconfig = 'other.toml'\n";
    let sentence = told(wrong, &[]).unwrap_err();
    for needed in [
        "FILE, line 1: there is no `memroy`; did you mean `memory`?",
        "FILE, line 2: there is no `kernel-cache`; did you mean `kernel_cache`?",
        "FILE, line 3: invalid value '1000' for '--cpus <N>'",
        "FILE, line 4: `thp` is true or false, and here it is of type string",
        "FILE, line 6: `disk` is text, or a list of texts, and here it is of type array",
        "FILE, line 7: there is no `zzz`; keys are the options",
        "FILE, line 8: invalid value 'up' for '--grow <HOW>' [possible values: auto, balloon, plug]",
        "FILE, line 9: there is no `config`",
    ] {
        assert!(sentence.contains(needed), "{needed}: {sentence}");
    }
    let twice = told("name = 'a'\nname = 'b'\nkernel =\n", &[]).unwrap_err();
    assert!(twice.contains("line 2: duplicate key") && twice.contains("line 3: "), "{twice}");
    let missing = expanded(["ballast", "run", "--config=/nowhere"].map(OsString::from).to_vec()).unwrap_err();
    assert!(format!("{missing:?}").contains("cannot read /nowhere"), "{missing:?}");
}

#[test]
fn a_check_finds_what_is_missing_too() {
    assert!(check(file(WEB).path()).is_ok());
    let lacks = check(file("name = 'web'\nkernel = 'k'\n").path()).unwrap_err();
    assert!(format!("{lacks:?}").contains("--memory"), "{lacks:?}");
    let both = check(file(&format!("{WEB}thp = true\nhugepages = '2M'\n")).path()).unwrap_err();
    assert!(format!("{both:?}").contains("cannot be used with"), "{both:?}");
}

#[test]
fn a_command_line_without_a_file_or_that_is_not_understood_stays_as_it_is() {
    for line in [
        "ballast run --kernel k --memory 64M",
        "ballast run --config",
        "ballast run --config x --help",
        "ballast ps --config",
    ] {
        let words: Vec<OsString> = line.split(' ').map(OsString::from).collect();
        assert_eq!(expanded(words.clone()).unwrap(), words, "{line}");
    }
}

#[test]
fn the_schema_for_editors_is_that_of_the_options() {
    let kept: serde_json::Value =
        serde_json::from_str(include_str!("../../../resources/vm.schema.json")).unwrap();
    assert!(
        kept == schema::schema(),
        "an option has changed: write `ballast manual-pages --schema` to resources/vm.schema.json"
    );
    let keys = kept.get("properties").and_then(serde_json::Value::as_object).unwrap();
    assert!(keys.contains_key("no_free_page_reporting") && !keys.contains_key("config"), "{keys:?}");
}
